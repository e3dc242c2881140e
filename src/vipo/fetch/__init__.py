"""What a recipe needs beside vipo: weights, prompts, packages; what of it is here, and how to get the rest. No torch."""
