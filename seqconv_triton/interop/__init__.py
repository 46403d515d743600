"""Translations from and to other formats."""
