"""What a store keeps, one class a kind of record; events and their folds stand together."""
