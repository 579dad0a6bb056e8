// Requests to the server that this page came from, and to no other.

let csrf = null;

export class ServerError extends Error {
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }

  /** Whether the same may be taken later: a server that is away may be back, and what it has refused it refuses again. */
  get retry() {
    return this.status === OFFLINE || this.status >= 500 || this.status === 429 || this.status === 408;
  }
}

export const OFFLINE = 0; // the status of an answer that never came

export async function openSession() {
  const session = await request("GET", "/session");
  csrf = session?.csrf ?? null;
  return session;
}

/** Send JSON, a form or bytes, get JSON. Throws ServerError; status OFFLINE when the server was not reached. */
export async function request(method, path, body, headers = {}) {
  const options = { method, headers: { Accept: "application/json", ...headers }, cache: "no-store" };
  if (method !== "GET" && csrf) options.headers["X-CSRF-Token"] = csrf;
  if (body instanceof FormData || body instanceof Blob) {
    options.body = body;
  } else if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await send(path, options);
  const text = await answer.text();
  let json = null;
  try {
    json = text ? JSON.parse(text) : null;
  } catch {
    throw new ServerError(answer.status, "the server's answer is no JSON");
  }
  if (!answer.ok) throw refusalOf(answer.status, json);
  return json;
}

/** Fetch what is no JSON: pixels, pictures. */
export async function fetchBytes(path) {
  const answer = await send(path, { cache: "no-store" });
  if (!answer.ok) throw new ServerError(answer.status, `not fetched (${answer.status})`);
  return answer;
}

async function send(path, options) {
  try {
    return await fetch(path, { ...options, credentials: "same-origin", redirect: "error" });
  } catch {
    throw new ServerError(OFFLINE, "the server cannot be reached");
  }
}

function refusalOf(status, json) {
  const message = json?.error?.message ?? `the server refused (${status})`;
  return new ServerError(status, message, json?.error?.param ?? null);
}
