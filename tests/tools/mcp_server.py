"""An MCP server by hand, in lines of JSON, that behaves as its first argument says."""

import json
import os
import sys
import time

MODE = sys.argv[1] if len(sys.argv) > 1 else "usual"
TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


def tools():
    if MODE == "thousand":
        return [{"name": f"tool{i}", "inputSchema": TEXT} for i in range(1000)]
    if MODE == "nonsense":
        return [{"name": "echo", "inputSchema": {"type": "object", "properties": ["no"]}}]
    wrong = [{"name": "bad name!", "inputSchema": TEXT}] if MODE == "lies" else []
    return wrong + [{"name": name, "description": "Say it", "inputSchema": TEXT} for name in NAMES]


NAMES = ("echo", "flood", "die", "sleep", "fail")


def called(name, text):
    if name == "flood":
        text = "x" * 10**6
    elif name == "die":
        os._exit(1)
    elif name == "sleep":
        time.sleep(600)
    return {"content": [{"type": "text", "text": text}], "isError": name == "fail"}


def answer(method, params):
    if method == "initialize":
        info = {"name": "hand", "version": "1"}
        version = params["protocolVersion"]
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": tools()}
    if method == "tools/call":
        return called(params["name"], params["arguments"].get("text", ""))
    return None


def main():
    if MODE == "dies":
        sys.exit("no key given")
    if MODE == "hangs":
        time.sleep(600)
    while MODE == "floods":
        print("x" * 65536, end="", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "id" not in request:
            continue
        result = answer(request["method"], request.get("params", {}))
        reply = {"result": result} if result else {"error": {"code": -32601, "message": "no"}}
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **reply}), flush=True)


if __name__ == "__main__":
    main()
