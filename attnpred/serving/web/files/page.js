// The page: documents at the left, the conversation at the right, and what connects them.

import { DocumentView } from "./document.js";
import { Answer, turn } from "./talk.js";

const $ = id => document.getElementById(id);
const view = new DocumentView($("text"), $("map"));
const state = { model: null, documents: [], open: null, messages: [], answers: [], chosen: null, asking: null };
const LONGEST = 400; // tokens of an answer
const KINDS = { md: "text/markdown", markdown: "text/markdown", pdf: "application/pdf" };

function say(text) {
  $("status").textContent = text;
}

async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.ok) return answer;
    if (answer.status === 401) {
      await askForKey();
      continue;
    }
    const body = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(body.error?.message ?? `the server answered ${answer.status}`), { status: answer.status });
  }
}

function askForKey() {
  return new Promise(done => {
    $("key").addEventListener("close", () => {
      sessionStorage.setItem("key", $("secret").value);
      done();
    }, { once: true });
    if (!$("key").open) $("key").showModal();
  });
}

// Documents

async function refresh() {
  state.documents = (await (await call("/v1/documents")).json()).data;
  shelve();
}

function shelve() {
  $("shelf").replaceChildren(...state.documents.map(one => {
    const item = document.createElement("li"), name = document.createElement("button"), away = document.createElement("button");
    item.className = one.id === state.open ? "open" : "";
    Object.assign(name, { type: "button", className: "name", textContent: one.name, title: `${one.name}, ${one.tokens.toLocaleString()} tokens` });
    if (one.id === state.open) name.setAttribute("aria-current", "true");
    Object.assign(away, { type: "button", className: "away", textContent: "\u00d7", title: `Delete ${one.name}`, ariaLabel: `Delete ${one.name}` });
    name.addEventListener("click", () => open(one.id));
    away.addEventListener("click", () => remove(one));
    item.append(name, away);
    return item;
  }));
}

async function open(id) {
  const { text, name } = await (await call(`/v1/documents/${id}/text`)).json();
  state.open = id;
  sessionStorage.setItem("open", id);
  $("empty").hidden = true;
  view.show(text);
  document.title = `${name} \u2013 attnpred`;
  begin();
  shelve();
  follow(id);
}

async function follow(id) {
  while (state.open === id) {
    const one = await (await call(`/v1/documents/${id}`)).json();
    const share = one.to_read_tokens ? one.read_tokens / one.to_read_tokens : 1;
    const isReading = one.status === "reading";
    $("reading").hidden = !isReading;
    if (!isReading) {
      if (one.status === "failed") say(one.error);
      return;
    }
    $("reading").setAttribute("aria-valuenow", Math.round(100 * share));
    $("reading").querySelector("i").style.width = `${100 * share}%`;
    $("reading").querySelector("span").textContent = `reading, ${one.read_tokens.toLocaleString()} of ${one.to_read_tokens.toLocaleString()} tokens`;
    await new Promise(done => setTimeout(done, 500));
  }
}

async function add(file) {
  const kind = KINDS[file.name.split(".").at(-1).toLowerCase()] ?? "text/plain";
  say(`taking in ${file.name} \u2026`);
  try {
    const answer = await call(`/v1/documents?name=${encodeURIComponent(file.name.slice(0, 150))}`, { method: "POST", body: file, headers: { "content-type": kind } });
    const made = await answer.json();
    say("");
    await refresh();
    await open(made.id);
  } catch (error) {
    say(error.message);
  }
}

async function remove(one) {
  try {
    await call(`/v1/documents/${one.id}`, { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) return say(error.message);
  }
  if (state.open === one.id) {
    state.open = null;
    sessionStorage.removeItem("open");
    view.hide();
    $("empty").hidden = false;
    $("reading").hidden = true;
    document.title = "attnpred";
    begin();
  }
  await refresh();
  say(`${one.name} is deleted`);
}

// The conversation

function begin() {
  state.asking?.abort();
  state.messages = [];
  state.answers = [];
  state.chosen = null;
  $("talk").replaceChildren();
  view.clear();
}

const listener = {
  chosen(answer, index) {
    state.chosen = answer;
    const passages = answer.readFor(index);
    view.glow(passages);
    view.reveal(passages);
    if (!passages.length) say("for this word everything was read, or nothing of the document stood out");
    else say("");
  },
  unchoose() {
    state.chosen?.unchoose();
    state.chosen = null;
    const last = state.answers.at(-1);
    view.glow(last ? last.readForAll() : []);
  },
};

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function write(answer, more, signal) {
  const body = {
    model: state.model.id, messages: state.messages, temperature: 0, max_tokens: LONGEST, stream: true, stream_options: { include_usage: true },
    documents: state.open ? [state.open] : [], reads: true, ...more,
  };
  const reply = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal });
  let counters, timings, reason;
  for await (const chunk of events(reply)) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.attnpred?.of) say(chunk.attnpred.read < chunk.attnpred.of ? `reading ${chunk.attnpred.read.toLocaleString()} of ${chunk.attnpred.of.toLocaleString()} tokens` : "");
    if (chunk.attnpred?.compression) counters = chunk.attnpred;
    timings = chunk.timings ?? timings;
    const choice = chunk.choices[0];
    if (!choice) continue;
    reason = choice.finish_reason ?? reason;
    const word = answer.add(choice.delta.content ?? "", chunk.attnpred?.passages);
    if (word && !state.chosen && chunk.attnpred?.passages) view.glow(Answer.passages(answer.words.slice(-6)).slice(0, 24));
    keepInView();
  }
  answer.finish(counters, timings, reason === "length" ? "at its longest" : "");
}

function keepInView() {
  const talk = $("talk");
  if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 160) talk.scrollTop = talk.scrollHeight;
}

async function ask(question) {
  const asking = state.asking = new AbortController();
  const isCompared = $("compare").checked;
  const budget = $("budget").value;  // left empty: the server's own
  const named = budget || $("budget").placeholder;
  const own = new Answer(isCompared ? `${state.model.attnpred.policy}, budget ${named}` : "", listener);
  const full = isCompared ? new Answer("full cache", listener) : null;
  state.messages.push({ role: "user", content: question });
  state.answers.push(own);
  $("talk").append(turn(question, full ? [own, full] : [own]));
  $("talk").scrollTop = $("talk").scrollHeight;
  $("send").textContent = "Stop";
  let current = own;
  try {
    await write(own, budget ? { budget: Number(budget) } : {}, asking.signal);
    if (full) {
      current = full;
      await write(full, { policy: "full", reads: false }, asking.signal);
    }
  } catch (error) {
    if (error.name === "AbortError") current.finish(null, null, "stopped");
    else current.fail(error.message);
    if (full && current === own) full.finish(null, null, "");
  }
  if (state.asking !== asking) return;
  state.messages.push({ role: "assistant", content: own.text });
  state.asking = null;
  $("send").textContent = "Ask";
  say("");
  if (!state.chosen) {
    const passages = own.readForAll();
    view.glow(passages);
    view.reveal(passages);
  }
}

// What people do

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  if (state.asking) return state.asking.abort();
  const question = $("question").value.trim();
  if (!question || !state.model) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!state.asking) $("ask").requestSubmit();
  }
});
$("new").addEventListener("click", () => { begin(); $("question").focus(); });
$("add").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { if ($("file").files[0]) add($("file").files[0]); $("file").value = ""; });
document.addEventListener("keydown", event => { if (event.key === "Escape") listener.unchoose(); });
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, event => {
  event.preventDefault();
  $("desk").classList.toggle("over", kind === "dragover");
  if (kind === "drop" && event.dataTransfer.files[0]) add(event.dataTransfer.files[0]);
});
document.addEventListener("dragleave", event => { if (!event.relatedTarget) $("desk").classList.remove("over"); });
let pointed = -1;
$("text").addEventListener("pointermove", event => {
  const letter = view.letterAt(event.clientX, event.clientY);
  if (letter === pointed) return;
  pointed = letter;
  state.answers.forEach(answer => answer.from(letter, view));
}, { passive: true });
$("text").addEventListener("pointerleave", () => { pointed = -1; state.answers.forEach(answer => answer.from(-1, view)); });

async function start() {
  for (;;) {
    try {
      [state.model] = (await (await call("/v1/models")).json()).data;
      break;
    } catch (error) {
      say(error.status === 503 ? "the model is being loaded \u2026" : error.message);
      await new Promise(done => setTimeout(done, 1000));
    }
  }
  say("");
  $("model").textContent = `${state.model.id}, ${state.model.context_length.toLocaleString()} tokens of context`;
  const budget = state.model.attnpred.budget;
  $("budget").placeholder = budget > 1 ? `${budget}` : `${Math.round(budget * 100)} %`;
  await refresh();
  const last = sessionStorage.getItem("open");
  const found = state.documents.find(one => one.id === last) ?? state.documents[0];
  if (found) await open(found.id);
  document.documentElement.dataset.ready = "yes";
}

start().catch(error => say(error.message));
