// Requests to the studio, and its errors.

// An answer that is an error: message, `param` (a flag or field), `problems` as [flag, text], `status`.
export class ApiFailure extends Error {
  constructor(status, error) {
    super(error.message || `error ${status}`);
    this.status = status;
    this.param = error.param || null;
    this.code = error.code || null;
    this.problems = error.problems || [];
  }
}

// api("POST", "/api/queue", {options}): the JSON of the answer. Throws ApiFailure. `signal` of an AbortController.
export async function api(method, path, body, { signal } = {}) {
  const headers = { "X-Language": document.documentElement.lang.startsWith("zh") ? "zh" : "en" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  const text = await response.text();
  let content = {};
  try {
    content = text ? JSON.parse(text) : {};
  } catch {
    content = { error: { message: text.slice(0, 300) } };
  }
  if (!response.ok) throw new ApiFailure(response.status, content.error || {});
  return content;
}
