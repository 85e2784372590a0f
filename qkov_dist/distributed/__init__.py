"""Who holds and owns what; how ranks meet, speak and fail. The only room that knows torch.distributed and MPI."""
