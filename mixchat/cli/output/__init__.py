"""The text, JSON, progress and errors that commands print.

- print_answer.py: one answer, on a terminal, into a pipe, or as JSON
- verbose.py: the figures of --verbose
- reports.py: the base of reports, and those on models and downloads
- plan_report.py, plan_text.py: a plan
- bench_report.py: the result of mixchat bench
- messages.py: errors and notes on standard error
- progress.py: Rich's bars on a terminal, lines elsewhere
"""
