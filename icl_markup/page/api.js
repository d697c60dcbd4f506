// Requests to the server, the API key among them. Nothing here touches the page.

const KEPT = "icl-markup-key"; // for this tab, until it is closed

/** What the server answered instead of a result; status 0: it did not answer. */
export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEPT, key);
}

/** Ask the server and return its answer; throws Refused. */
export async function ask(method, path, body) {
  const headers = {};
  const key = sessionStorage.getItem(KEPT);
  if (key) headers["X-API-Key"] = key;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Refused(0, "the server does not answer; is it still running?");
  }
  let found;
  try {
    found = await answer.json();
  } catch {
    found = {};
  }
  if (!answer.ok) throw new Refused(answer.status, found.detail ?? `the server answered ${answer.status}`);
  return found;
}

/** Make an element; children are elements or text, and text stays text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
