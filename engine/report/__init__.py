"""What a run looks like: numbers over its records (`summary`), charts, one self-contained page (`page`)."""
