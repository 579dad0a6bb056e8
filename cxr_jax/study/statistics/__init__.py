"""Statistics of studies in which every reader reads many cases: readers and cases are both drawn at random."""
