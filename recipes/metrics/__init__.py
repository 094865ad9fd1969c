"""The scores of the papers, each with where its definition comes from."""
