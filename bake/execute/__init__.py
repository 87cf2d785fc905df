"""Does what the plan says and nothing else: reads, computes, writes."""
