"""What a trained automaton is worth, in the terms of what it is for; no training uses any of it."""
