"""Answers of a given form: JSON by a schema, or text by a grammar, token by token.

- form.py: a form, made from a schema or a grammar
- read_form.py: forms from files and from the command line
- schema_fault.py: the part of a schema that is at fault
- schema_tree.py: the parts of a schema
- gbnf.py: grammars of llama.cpp as Lark grammars
- grammar_fault.py: what is wrong with a grammar, by llguidance
- checked_form.py: forms that were checked in a sandbox
- constraint.py: the tokens that keep an answer in its form
- form_child.py: the inside of the sandbox
"""
