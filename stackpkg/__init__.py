"""stackpkg: a training stack you read like a book and run like a pipeline."""

__version__ = "0.1.0"
