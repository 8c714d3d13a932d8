"""The losses in the trainers of other packages. Nothing here is imported with fusedloss itself."""
