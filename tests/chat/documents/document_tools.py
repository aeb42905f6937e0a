"""PDFs, small and malicious, and a server of pages on this machine."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


def pdf(pages: Sequence[str | bytes], trailer: str = "") -> bytes:
    """A PDF with a page for each text. Bytes are a page's compressed content."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, page in enumerate(pages):
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        text = f"BT /F1 12 Tf 72 700 Td ({page}) Tj ET" if page else ""
        data = page if isinstance(page, bytes) else zlib.compress(text.encode())
        head = f"<< /Length {len(data)} /Filter /FlateDecode >>\nstream\n".encode()
        objects.append(head + data + b"\nendstream")
    out = bytearray(b"%PDF-1.4\n")
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    out += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\n".encode()
    return bytes(out + f"startxref\n{start}\n%%EOF\n".encode())


def deflated_zeros(count: int) -> bytes:
    """Millions of zeros, compressed. A million is packed once, since each packs alike."""
    packer = zlib.compressobj(9, wbits=-15)
    million = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = (count % 65521 << 16 | 1).to_bytes(4, "big")  # Adler-32 of `count` zeros
    return b"\x78\xda" + million * (count // 10**6) + packer.flush() + checksum


def sent(body: bytes, content_type: str = "text/html", status: int = 200, **headers: str) -> Answer:
    """An answer with this body. `Content_Length` and other headers replace what is usual."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        usual = {"Content_Type": content_type, "Content_Length": str(len(body))}
        for name, value in {**usual, **headers}.items():
            if value:
                request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def moved(target: str) -> Answer:
    """A redirect."""
    return sent(b"", status=302, Location=target)


@contextmanager
def pages(answers: dict[str, Answer]) -> Iterator[str]:
    """The address of a server with an answer for each path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.get(self.path, sent(b"no", status=404))(self)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.handle_error = lambda *arguments: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
