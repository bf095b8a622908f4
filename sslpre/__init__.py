"""sslpre turns a folder of unlabelled images into a good encoder, and proves that it is good."""

__version__ = "0.1.0"
