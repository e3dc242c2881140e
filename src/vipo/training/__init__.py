"""The loop: the trainer is its sentence, the learner makes its updates, losses and credits say what of."""
