"""Where prompts come from and which iteration trains on which."""
