"""What things cost, side by side with what a user would take instead."""
