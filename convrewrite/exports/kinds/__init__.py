"""One file for each form a result can be exported to."""
