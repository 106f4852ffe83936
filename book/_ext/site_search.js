// The search page: BM25 over sections, theorems and claims (records.js, made by site_search.py
// when the site is built), best first, each with the words found. From the disk, too.
(function () {
  "use strict";

  var FIELDS = { t: 5, c: 2, x: 1 }; // title, its chapter's title, text: weights
  var KINDS = { chapter: 2.2, section: 1.25, theorem: 1.1, claim: 0.9, reference: 0.35 };
  var OVERVIEW = 0.45; // a page that tells what a chapter derives comes after the chapter
  var K1 = 1.2, B = 0.6;

  // Lower case, powers kept (R^c), a plural s and a last y dropped (sparsify meets
  // sparsification, as a beginning).
  function words(text) {
    var found = text.toLowerCase().match(/[a-z0-9]+(?:\^[a-z0-9]+)?/g) || [];
    return found.map(function (word) {
      return word.length > 3 && /[^su]s$|[^ao]y$/.test(word) ? word.slice(0, -1) : word;
    });
  }

  function weighted(record) {
    var counts = Object.create(null), length = 0;
    Object.keys(FIELDS).forEach(function (field) {
      words(record[field] || "").forEach(function (word) {
        counts[word] = (counts[word] || 0) + FIELDS[field];
        length += FIELDS[field];
      });
    });
    return { record: record, counts: counts, length: length };
  }

  // A query word stands for itself and, with three letters or more, for longer words
  // that begin with it, which count half.
  function expand(word, vocabulary) {
    var terms = [[word, 1]];
    if (word.length >= 3) {
      vocabulary.forEach(function (other) {
        if (other !== word && other.startsWith(word)) terms.push([other, 0.5]);
      });
    }
    return terms;
  }

  // Word counts of all records, and in how many records each word stands; made once.
  var made = null;
  function index(records) {
    if (made && made.records === records) return made;
    var all = records.map(weighted), documents = Object.create(null), sum = 0;
    all.forEach(function (one) {
      sum += one.length;
      Object.keys(one.counts).forEach(function (word) {
        documents[word] = (documents[word] || 0) + 1;
      });
    });
    made = { records: records, all: all, documents: documents, mean: sum / all.length,
      vocabulary: Object.keys(documents) };
    return made;
  }

  function search(query, records) {
    var known = index(records), all = known.all, documents = known.documents;
    var asked = words(query), mean = known.mean, vocabulary = known.vocabulary;
    var phrase = asked.join(" ");
    var parts = asked.map(function (word) { return expand(word, vocabulary); });
    return all.map(function (one) {
      var score = 0, met = 0;
      parts.forEach(function (terms) {
        var best = 0;
        terms.forEach(function (term) {
          var count = one.counts[term[0]];
          if (!count) return;
          var rare = Math.log(1 + (all.length - documents[term[0]] + 0.5) / (documents[term[0]] + 0.5));
          var norm = K1 * (1 - B + B * one.length / mean);
          best = Math.max(best, term[1] * rare * count * (K1 + 1) / (count + norm));
        });
        if (best > 0) met += 1;
        score += best;
      });
      if (met < parts.length) score *= 0.25 * met / parts.length;
      // a title that says what was asked, and little else
      var title = words(one.record.t);
      if (title.join(" ").includes(phrase)) score *= 1 + 1.5 * asked.length / title.length;
      return { record: one.record, score: score * KINDS[one.record.k] * (one.record.o ? OVERVIEW : 1) };
    }).filter(function (hit) { return hit.score > 0; })
      .sort(function (a, b) { return b.score - a.score; });
  }

  // About 160 letters of the text around the first word found.
  function snippet(text, asked) {
    var at = -1;
    asked.forEach(function (word) {
      var here = text.toLowerCase().indexOf(word);
      if (here >= 0 && (at < 0 || here < at)) at = here;
    });
    var start = Math.max(0, at - 60);
    if (start > 0) start = text.indexOf(" ", start) + 1;
    var cut = text.slice(start, start + 170);
    if (start + 170 < text.length) cut = cut.slice(0, cut.lastIndexOf(" ")) + " …";
    return (start > 0 ? "… " : "") + cut;
  }

  // The words found, marked; text goes in as text, never as HTML.
  function marked(node, text, asked) {
    var escaped = asked.map(function (word) { return word.replace(/[\^$]/g, "\\$&"); });
    var pattern = asked.length ? new RegExp("(\\b(?:" + escaped.join("|") + ")\\w*)", "gi") : null;
    (pattern ? text.split(pattern) : [text]).forEach(function (part, index) {
      var child = document.createElement(index % 2 ? "mark" : "span");
      child.textContent = part;
      node.append(child);
    });
  }

  function show(query) {
    var place = document.getElementById("search-results"), asked = words(query);
    place.replaceChildren();
    var hits = asked.length ? search(query, window.bookRecords) : [];
    var said = document.createElement("p");
    said.setAttribute("role", "status");
    said.textContent = !asked.length ? "" : hits.length
      ? hits.length + " places" + (hits.length > 60 ? ", the first 60 shown" : "") + ", best first"
      : "Nothing found for “" + query + "”.";
    var list = document.createElement("ul");
    list.className = "search";
    hits.slice(0, 60).forEach(function (hit) {
      var item = document.createElement("li"), link = document.createElement("a");
      var kind = document.createElement("span"), text = document.createElement("p");
      link.href = hit.record.u;
      marked(link, hit.record.t, asked);
      kind.className = "search-place";
      kind.textContent = hit.record.k + (hit.record.k === "chapter" ? "" : " in " + hit.record.c);
      text.className = "search-text";
      marked(text, snippet(hit.record.x, asked), asked);
      item.append(link, kind, text);
      list.append(item);
    });
    place.append(said, list);
  }

  window.bookSearch = { search: search, words: words };

  document.addEventListener("DOMContentLoaded", function () {
    var query = new URLSearchParams(location.search).get("q") || "";
    document.querySelectorAll("input[name=q]").forEach(function (box) {
      box.value = query;
      if (box.closest(".bd-search-container")) {
        box.addEventListener("input", function () { show(box.value); });
      }
    });
    show(query);
  });
})();
