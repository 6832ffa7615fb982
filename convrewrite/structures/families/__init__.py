"""One file for each family of linear replacements; a new file here is a new structure."""
