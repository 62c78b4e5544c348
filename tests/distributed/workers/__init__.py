"""Programs that the tests of several ranks run on every rank."""
