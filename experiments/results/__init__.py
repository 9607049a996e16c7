"""Results: made, shown, read again, and put beside others."""
