"""Text that others have made up, before people see it."""


def printable(text: str) -> str:
    """On one line, and without what would move the cursor of a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
