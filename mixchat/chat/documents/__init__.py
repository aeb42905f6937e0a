"""The text of PDFs and web pages that a person names.

- document.py: asks the sandbox for the text, and says what is missing
- document_child.py: the inside of the sandbox, where pypdf and resiliparse run
- web_file.py: fetches the file at an address, bounded in bytes, seconds and redirects
"""
