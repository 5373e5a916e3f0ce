"""Words for messages."""


def counted(number: int, noun: str) -> str:
    """Return the number with a noun whose plural ends in "s", for example "1 sample" or "1,200 samples"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
