"""The command line: groups of verbs, no work in them."""
