"""Asks a server for answers with the openai package."""

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "say:well"}]}


def ask(client, text, **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="scripted", messages=messages, **options)


def streamed(client, text, **options):
    return list(ask(client, text, stream=True, **options))


def text_of(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)
