"""What a sick machine looks like to the checks."""
