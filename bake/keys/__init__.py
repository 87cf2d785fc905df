"""Names only: which key means which factor, which spelling means which tensor. Standard library only."""
