"""Recommendations from what customers bought, by tables whose rows are shared out over processes."""
