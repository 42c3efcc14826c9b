"""Outputs on the Hub: pushed whole, and compared there with what lies here."""
