"""The command line ``magicdrive``: one module for each group of verbs, which call the packages that do the work."""
