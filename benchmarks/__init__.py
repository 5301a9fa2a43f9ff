"""Speed, measured. Not part of the wheel, never run by the tests."""
