"""The output of commands: text, JSON, progress, errors.

- print_answer.py: one answer, on a terminal, into a pipe, or as JSON
- plan_verdict.py, plan_text.py, plan_json.py: a plan
- model_text.py: the installed models
- download_text.py: the plan of a download
- table.py: columns of equal width
- bench_text.py: the results of mixchat bench
- verbose.py: the figures of --verbose
- failure.py: errors, notes and questions on standard error
- show_progress.py, bars.py: bars on a terminal of any width, lines elsewhere
- png.py: pictures, where matplotlib is installed
"""
