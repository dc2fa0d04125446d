"""Write an adapter in a form that another program reads, and ask that program whether it says the same."""
