"""What tests do in a process of their own; see children.py."""
