// In the room: the link to thought capture leads to the film that is open.

const link = document.getElementById("capture-link");

// Which film that is, is known only when the link is followed; a film is named by its hash.
function follow() {
  const film = document.getElementById("film")?.viewer?.film;
  link.href = film ? `/capture?image=${film.sha256}` : "/capture";
}

if (link) for (const kind of ["pointerenter", "focus", "click"]) link.addEventListener(kind, follow);
