"""The output layer and its cross entropy in chunks of tokens, so that whole logits are never held."""
