// The service's API: sends the key along, and turns every failure into an error that a person can read.

const KEY = "coterie-key";

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

// Paths are relative to the page, which may lie below a path of a proxy.
async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path.replace(/^\//, ""), { ...options, headers });
  } catch {
    throw new ApiError("the service cannot be reached", 0, "unreachable");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const error = said?.error ?? {};
  throw new ApiError(error.message ?? `the service answered ${response.status}`, response.status, error.code);
}

export async function ask(path, options) {
  return (await send(path, { ...options, headers: { Accept: "application/json", ...options?.headers } })).json();
}

const pictures = new Map();

// The address of a picture in this tab. As an image's own address it would be asked for without the key.
export function picture(path) {
  if (!pictures.has(path)) {
    const loading = send(path).then(async (response) => URL.createObjectURL(await response.blob()));
    loading.catch(() => pictures.delete(path));
    pictures.set(path, loading);
  }
  return pictures.get(path);
}

export function form(files) {
  const data = new FormData();
  for (const file of files) data.append("file", file, file.name || "image");
  return data;
}

export function* parts(list, size) {
  for (let start = 0; start < list.length; start += size) yield list.slice(start, start + size);
}

export function uniqueKey() {
  // randomUUID is there on encrypted pages only.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
