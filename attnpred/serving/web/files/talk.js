// Questions and answers: an answer word by word, each with the passages that were read for it.

const KEPT = 12; // passages of a word that are shown
const make = (tag, name, text = "") => Object.assign(document.createElement(tag), { className: name, textContent: text });
const bytes = n => n >= 1 << 20 ? `${(n / (1 << 20)).toFixed(1)} MiB` : `${(n / 1024).toFixed(0)} KiB`;

export class Answer {
  constructor(title, listener) {
    this.listener = listener;
    this.text = "";
    this.words = []; // { element, passages: Map "first-last" -> [first, last, weight] }
    this.element = make("div", "answer writing");
    if (title) this.element.append(make("h2", "", title));
    this.box = make("p", "words");
    this.box.setAttribute("aria-live", "polite");
    this.figures = make("dl", "figures");
    this.element.append(this.box, this.figures);
    this.box.addEventListener("click", event => this.choose(event.target.closest(".word")));
    this.box.addEventListener("keydown", event => this.key(event));
  }

  // A piece of text, and the passages that were read for it.
  add(piece, passages) {
    this.text += piece;
    if (!this.words.length) piece = piece.trimStart();
    for (const part of piece.split(/(?=\s)/)) {
      if (!part) continue;
      const last = this.words.at(-1);
      if (!last || /^\s/.test(part)) {
        const element = make("span", "word", part);
        element.tabIndex = this.words.length ? -1 : 0;
        this.words.push({ element, passages: new Map() });
        this.box.append(element);
      } else last.element.textContent += part;
    }
    const word = this.words.at(-1);
    if (word) for (const [, first, last, weight] of passages ?? []) {
      const name = `${first}-${last}`, old = word.passages.get(name);
      if (!old || old[2] < weight) word.passages.set(name, [first, last, weight]);
    }
    return word;
  }

  // What was read for one word, heaviest first, weights from 0 to 1.
  static passages(words) {
    const found = new Map();
    for (const word of words) for (const [name, one] of word.passages) {
      const old = found.get(name);
      if (!old || old[2] < one[2]) found.set(name, one);
    }
    const sorted = [...found.values()].sort((a, b) => b[2] - a[2]);
    const most = sorted.length ? sorted[0][2] : 1;
    return sorted.filter(one => one[2] > most / 25).map(([first, last, weight]) => [first, last, weight / most]);
  }

  readFor(index) {
    return Answer.passages([this.words[index]]).slice(0, KEPT);
  }

  readForAll() {
    return Answer.passages(this.words).slice(0, 3 * KEPT);
  }

  // Marks the words for which the passage at this letter was among the most read ones.
  from(letter, view) {
    const isAt = ([first, last, weight]) => {
      const [from, to] = view.shown(first, last);
      return weight > .3 && from <= letter && letter < to;
    };
    this.words.forEach((word, index) => {
      const is = letter >= 0 && this.readFor(index).some(isAt);
      word.element.classList.toggle("from", is);
    });
  }

  choose(element) {
    const index = this.words.findIndex(word => word.element === element);
    if (index < 0) return;
    const was = element.classList.contains("chosen");
    this.listener.unchoose();
    if (was) return;
    for (const word of this.words) word.element.tabIndex = -1;
    element.tabIndex = 0;
    element.classList.add("chosen");
    this.listener.chosen(this, index);
  }

  unchoose() {
    for (const word of this.words) word.element.classList.remove("chosen");
  }

  key(event) {
    const index = this.words.findIndex(word => word.element === document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (index < 0) return;
    if (step && this.words[index + step]) {
      event.preventDefault();
      this.words[index].element.tabIndex = -1;
      this.words[index + step].element.tabIndex = 0;
      this.words[index + step].element.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.choose(this.words[index].element);
    }
  }

  // counters, timings: as the server tells them.
  finish(counters, timings, cut) {
    this.element.classList.remove("writing");
    const rows = [];
    if (counters) {
      const times = counters.compression > 1.05 ? ` (${counters.compression.toFixed(1)} times less)` : "";
      rows.push(["KV read per token", `${bytes(counters.kv_bytes_per_token)} of ${bytes(counters.full_kv_bytes_per_token)}${times}`]);
      rows.push(["KV in fast memory", bytes(counters.fast_bytes)]);
      if (counters.hit_rate != null) rows.push(["hit rate", `${(100 * counters.hit_rate).toFixed(1)} %`]);
    }
    if (timings) {
      rows.push(["speed", `${timings.predicted_per_second.toFixed(1)} tokens/s, the first after ${((timings.queued_ms + timings.prompt_ms) / 1000).toFixed(1)} s`]);
      rows.push(["read before", `${timings.cache_n.toLocaleString()} of ${(timings.cache_n + timings.prompt_n).toLocaleString()} tokens`]);
    }
    if (cut) rows.push(["cut off", cut]);
    this.figures.replaceChildren(...rows.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
  }

  fail(message) {
    this.element.classList.remove("writing");
    this.box.append(make("span", "fault", message));
  }
}

export function turn(question, answers) {
  const element = make("div", "turn"), row = make("div", "answers");
  row.append(...answers.map(answer => answer.element));
  element.append(make("p", "question", question), row);
  return element;
}
