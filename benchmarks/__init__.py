"""Questions about the package that are answered with numbers; one file a question."""
