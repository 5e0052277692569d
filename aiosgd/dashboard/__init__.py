"""The live page: what a report shows, of the job that runs on a cluster, in a browser."""
