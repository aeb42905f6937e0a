"""Answers of a given form, which is JSON by a schema, or text by a grammar, token by token.

- output_constraint.py: schemas and grammars, read from files or requests and checked in a sandbox
- schema.py: the part of a JSON schema that is at fault
- grammar.py: the faults of a grammar, and llama.cpp's grammars as Lark grammars
- constraint.py: the tokens that may come next in an answer, or in the calls of one
- call_form.py: calls of tools, held to the tools' schemas
- literal_form.py: arguments of calls that are literals
- ending.py: a short end of an answer in JSON, and when it has to follow
- form_child.py: the inside of the sandbox
"""
