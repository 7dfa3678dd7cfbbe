"""The filters that come with nbdkitpy; each is found by its entry point, as a stranger's is."""
