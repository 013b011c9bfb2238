"""The command line: each verb parses, makes one call of the API, and prints."""
