"""What is this file? Names, shapes and small stored numbers in, facts with their evidence out."""
