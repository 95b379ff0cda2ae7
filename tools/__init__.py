"""The programs that people run; nothing imports this package."""
