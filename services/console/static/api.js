// What the page asks for, and the two things that it can do.

export class ApiError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

async function answer(response) {
  let body;
  try {
    body = await response.json();
  } catch {
    throw new ApiError(String(response.status), `The console answered with ${response.status}.`);
  }
  if (!response.ok) throw new ApiError(body.error?.code ?? String(response.status), body.error?.message ?? "It failed.");
  return body;
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ApiError("UNREACHABLE", "The console cannot be reached.");
  }
  return answer(response);
}

export function get(path, query = {}) {
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value));
  return call(asked.size ? `${path}?${asked}` : path, { headers: { accept: "application/json" } });
}

export function post(path, body) {
  return call(path, {
    method: "POST",
    headers: { "content-type": "application/json", "x-tidings-console": "1" },
    body: JSON.stringify(body),
  });
}
