"""What a recipe needs beside vipo: weights, prompts, packages; what is here, how to get the rest. No torch."""
