/* bare: the least that an NBD server can do, as the limit of what is possible on a machine.

   bare SOCKET IMAGE, or bare PORT IMAGE for TCP on loopback; bare --version.

   One thread for each connection reads whatever has arrived into one buffer, takes every request out of it, and answers
   them all with one gather write; large reads go from the file to the socket by sendfile. Simple and structured
   replies; READ, WRITE, FLUSH and DISC; the export is called whatever the client likes. It is for measuring only: there
   is no limit on anything, and a client that breaks the protocol is hung up on. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define BUFFER (256 << 10)     /* what is received at once */
#define ARENA (1 << 20)        /* data of the replies of a batch */
#define FROM_FILE (32 << 10)   /* reads of this size go by sendfile */
#define MOST_PIECES 1024       /* IOV_MAX */
#define MOST_OPTION (64 << 10) /* bytes of an option */
#define SEND_BUFFER (1 << 20)  /* of a Unix socket */

#define NBDMAGIC 0x4e42444d41474943
#define IHAVEOPT 0x49484156454f5054
#define OPTION_REPLY_MAGIC 0x0003e889045565a9
#define REQUEST_MAGIC 0x25609513
#define SIMPLE_REPLY_MAGIC 0x67446698
#define STRUCTURED_REPLY_MAGIC 0x668e33ef

#define FIXED_NEWSTYLE_NO_ZEROES 3
#define C_NO_ZEROES 2

enum option { EXPORT_NAME = 1, ABORT = 2, INFO = 6, GO = 7, STRUCTURED_REPLY = 8 };
enum option_reply { ACK = 1, REP_INFO = 3 };
#define ERR_UNSUP 0x80000001u

enum command { READ = 0, WRITE = 1, DISC = 2, FLUSH = 3 };
enum chunk { OFFSET_DATA = 1, ERROR = 32769 };
#define DONE 1
#define COMMAND_FUA 1
#define WIRE_EIO 5
#define WIRE_EINVAL 22

/* HAS_FLAGS, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN */
#define TRANSMISSION_FLAGS (1 << 0 | 1 << 2 | 1 << 3 | 1 << 8)

struct request {
  uint32_t magic;
  uint16_t flags, command;
  uint64_t cookie, offset;
  uint32_t length;
} __attribute__ ((packed));

struct simple_reply {
  uint32_t magic, error;
  uint64_t cookie;
} __attribute__ ((packed));

struct data_chunk {
  uint32_t magic;
  uint16_t flags, type;
  uint64_t cookie;
  uint32_t length;
  uint64_t offset;
} __attribute__ ((packed));

struct error_chunk {
  uint32_t magic;
  uint16_t flags, type;
  uint64_t cookie;
  uint32_t length;
  uint32_t error;
  uint16_t message_length;
} __attribute__ ((packed));

union header {
  struct simple_reply simple;
  struct data_chunk data;
  struct error_chunk error;
};

struct connection {
  int socket;
  bool structured;
  size_t start, end;                  /* of what is in the buffer, and not done yet */
  int pieces;                         /* of the batch, two for each reply with data */
  int headers;
  size_t used;                        /* bytes of the arena */
  char *payload;                      /* of writes that do not fit into the buffer */
  size_t payload_size;
  union header header[MOST_PIECES];
  struct iovec piece[MOST_PIECES];
  char buffer[BUFFER];
  char arena[ARENA];
};

static int image;
static uint64_t image_size;

static void
fail (const char *what)
{
  perror (what);
  exit (1);
}

/* --- whole messages --- */

static bool
receive_all (int socket, void *to, size_t count)
{
  return count == 0 || recv (socket, to, count, MSG_WAITALL) == (ssize_t) count;
}

static bool
send_all (int socket, struct iovec *piece, int pieces, int flags)
{
  while (pieces > 0) {
    struct msghdr message = { .msg_iov = piece, .msg_iovlen = pieces };
    ssize_t sent = sendmsg (socket, &message, flags | MSG_NOSIGNAL);
    if (sent < 0)
      return false;
    for (; pieces > 0 && (size_t) sent >= piece->iov_len; piece++, pieces--)
      sent -= piece->iov_len;
    if (pieces > 0) {
      piece->iov_base = (char *) piece->iov_base + sent;
      piece->iov_len -= sent;
    }
  }
  return true;
}

static bool
send_bytes (int socket, void *from, size_t count)
{
  struct iovec piece = { from, count };
  return send_all (socket, &piece, 1, 0);
}

/* --- handshake --- */

static bool
reply_to_option (int socket, uint32_t option, uint32_t type, const void *data, uint32_t length)
{
  struct {
    uint64_t magic;
    uint32_t option, type, length;
    char data[12];
  } __attribute__ ((packed)) reply = { htobe64 (OPTION_REPLY_MAGIC), htobe32 (option), htobe32 (type),
                                       htobe32 (length), "" };
  if (length)
    memcpy (reply.data, data, length);
  return send_bytes (socket, &reply, 20 + length);
}

static bool
send_export_info (int socket, uint32_t option)
{
  struct {
    uint16_t type;
    uint64_t size;
    uint16_t flags;
  } __attribute__ ((packed)) info = { 0, htobe64 (image_size), htobe16 (TRANSMISSION_FLAGS) };
  return reply_to_option (socket, option, REP_INFO, &info, sizeof info)
         && reply_to_option (socket, option, ACK, NULL, 0);
}

/* Answer EXPORT_NAME, which is answered unlike any other option. */
static bool
send_export (int socket, bool zeroes)
{
  struct {
    uint64_t size;
    uint16_t flags;
    char zeroes[124];
  } __attribute__ ((packed)) export = { htobe64 (image_size), htobe16 (TRANSMISSION_FLAGS), "" };
  return send_bytes (socket, &export, zeroes ? sizeof export : 10);
}

/* Return whether the client goes on to the transmission phase. */
static bool
handshake (struct connection *c)
{
  struct {
    uint64_t magic, option_magic;
    uint16_t flags;
  } __attribute__ ((packed)) greeting = { htobe64 (NBDMAGIC), htobe64 (IHAVEOPT), htobe16 (FIXED_NEWSTYLE_NO_ZEROES) };
  struct {
    uint64_t magic;
    uint32_t option, length;
  } __attribute__ ((packed)) head;
  uint32_t flags;

  if (!send_bytes (c->socket, &greeting, sizeof greeting) || !receive_all (c->socket, &flags, sizeof flags))
    return false;
  for (;;) {
    if (!receive_all (c->socket, &head, sizeof head) || head.magic != htobe64 (IHAVEOPT)
        || be32toh (head.length) > MOST_OPTION || !receive_all (c->socket, c->buffer, be32toh (head.length)))
      return false;
    uint32_t option = be32toh (head.option);
    bool sent;
    switch (option) {
    case EXPORT_NAME:
      return send_export (c->socket, !(be32toh (flags) & C_NO_ZEROES));
    case GO:
      return send_export_info (c->socket, option);
    case INFO:
      sent = send_export_info (c->socket, option);
      break;
    case STRUCTURED_REPLY:
      c->structured = true;
      sent = reply_to_option (c->socket, option, ACK, NULL, 0);
      break;
    case ABORT:
      reply_to_option (c->socket, option, ACK, NULL, 0);
      return false;
    default:
      sent = reply_to_option (c->socket, option, ERR_UNSUP, NULL, 0);
    }
    if (!sent)
      return false;
  }
}

/* --- transmission --- */

static bool
flush_batch (struct connection *c, int flags)
{
  bool sent = send_all (c->socket, c->piece, c->pieces, flags);
  c->pieces = c->headers = 0;
  c->used = 0;
  return sent;
}

static void
add_piece (struct connection *c, void *from, size_t count)
{
  c->piece[c->pieces++] = (struct iovec){ from, count };
}

/* Add the reply to what has no data, or failed. Success may be told by a simple reply in any case. */
static void
add_status (struct connection *c, const struct request *request, uint32_t error)
{
  union header *header = &c->header[c->headers++];
  if (error && c->structured) {
    header->error = (struct error_chunk){ htobe32 (STRUCTURED_REPLY_MAGIC), htobe16 (DONE), htobe16 (ERROR),
                                          request->cookie, htobe32 (6), htobe32 (error), 0 };
    add_piece (c, header, sizeof header->error);
  }
  else {
    header->simple = (struct simple_reply){ htobe32 (SIMPLE_REPLY_MAGIC), htobe32 (error), request->cookie };
    add_piece (c, header, sizeof header->simple);
  }
}

static void
add_data_header (struct connection *c, const struct request *request, uint32_t length)
{
  union header *header = &c->header[c->headers++];
  if (c->structured) {
    header->data = (struct data_chunk){ htobe32 (STRUCTURED_REPLY_MAGIC), htobe16 (DONE), htobe16 (OFFSET_DATA),
                                        request->cookie, htobe32 (length + 8), request->offset };
    add_piece (c, header, sizeof header->data);
  }
  else {
    header->simple = (struct simple_reply){ htobe32 (SIMPLE_REPLY_MAGIC), 0, request->cookie };
    add_piece (c, header, sizeof header->simple);
  }
}

static bool
do_read (struct connection *c, const struct request *request, uint64_t offset, uint32_t length)
{
  if (length >= FROM_FILE) {
    off_t position = offset;
    add_data_header (c, request, length);
    if (!flush_batch (c, MSG_MORE))
      return false;
    while (length > 0) {
      ssize_t sent = sendfile (c->socket, image, &position, length);
      if (sent <= 0)
        return false;
      length -= sent;
    }
    return true;
  }
  if (c->used + length > ARENA && !flush_batch (c, 0))
    return false;
  char *data = c->arena + c->used;
  if (pread (image, data, length, offset) != (ssize_t) length) {
    add_status (c, request, WIRE_EIO);
    return true;
  }
  add_data_header (c, request, length);
  add_piece (c, data, length);
  c->used += length;
  return true;
}

/* Return the payload of a write, whose header has been taken out of the buffer; NULL if the client has left. */
static const char *
take_payload (struct connection *c, uint32_t length)
{
  size_t there = c->end - c->start;
  if (there >= length) {
    c->start += length;
    return c->buffer + c->start - length;
  }
  if (c->payload_size < length) {
    free (c->payload);
    c->payload = malloc (length);
    c->payload_size = length;
    if (c->payload == NULL)
      fail ("malloc");
  }
  memcpy (c->payload, c->buffer + c->start, there);
  c->start = c->end = 0;
  return receive_all (c->socket, c->payload + there, length - there) ? c->payload : NULL;
}

static bool
do_write (struct connection *c, const struct request *request, uint64_t offset, uint32_t length)
{
  /* Replies do not wait for the rest of a payload, which the client may not send before it has them. */
  if (c->end - c->start < length && !flush_batch (c, 0))
    return false;
  const char *payload = take_payload (c, length);
  if (payload == NULL)
    return false;
  bool fits = offset <= image_size && length <= image_size - offset;
  bool done = fits && pwrite (image, payload, length, offset) == (ssize_t) length;
  if (done && be16toh (request->flags) & COMMAND_FUA)
    done = fdatasync (image) == 0;
  add_status (c, request, done ? 0 : fits ? WIRE_EIO : WIRE_EINVAL);
  return true;
}

/* Carry out a request; return whether the connection goes on. */
static bool
carry_out (struct connection *c, const struct request *request)
{
  uint64_t offset = be64toh (request->offset);
  uint32_t length = be32toh (request->length);
  if (c->pieces > MOST_PIECES - 2 && !flush_batch (c, 0))
    return false;
  switch (be16toh (request->command)) {
  case READ:
    if (offset <= image_size && length <= image_size - offset)
      return do_read (c, request, offset, length);
    break;
  case WRITE:
    return do_write (c, request, offset, length);
  case FLUSH:
    add_status (c, request, fdatasync (image) == 0 ? 0 : WIRE_EIO);
    return true;
  case DISC:
    return false;
  }
  add_status (c, request, WIRE_EINVAL);
  return true;
}

static void
transmission (struct connection *c)
{
  for (;;) {
    struct request request;
    while (c->end - c->start >= sizeof request) {
      memcpy (&request, c->buffer + c->start, sizeof request);
      c->start += sizeof request;
      if (request.magic != htobe32 (REQUEST_MAGIC) || !carry_out (c, &request)) {
        flush_batch (c, 0);
        return;
      }
    }
    if (!flush_batch (c, 0))
      return;
    memmove (c->buffer, c->buffer + c->start, c->end - c->start);
    c->end -= c->start;
    c->start = 0;
    ssize_t count = recv (c->socket, c->buffer + c->end, BUFFER - c->end, 0);
    if (count <= 0)
      return;
    c->end += count;
  }
}

static void *
serve (void *argument)
{
  struct connection *c = argument;
  int one = 1, size = SEND_BUFFER;
  setsockopt (c->socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* fails for Unix sockets */
  struct sockaddr_storage name;
  socklen_t length = sizeof name;
  if (getsockname (c->socket, (struct sockaddr *) &name, &length) == 0 && name.ss_family == AF_UNIX)
    setsockopt (c->socket, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
  if (handshake (c))
    transmission (c);
  close (c->socket);
  free (c->payload);
  free (c);
  return NULL;
}

/* --- start --- */

static int
listen_at (const char *where)
{
  int port = atoi (where), one = 1;
  int listener = socket (port ? AF_INET : AF_UNIX, SOCK_STREAM, 0);
  struct sockaddr_in tcp = { .sin_family = AF_INET, .sin_port = htons (port) };
  struct sockaddr_un local = { .sun_family = AF_UNIX };
  tcp.sin_addr.s_addr = htonl (INADDR_LOOPBACK);
  strncpy (local.sun_path, where, sizeof local.sun_path - 1);
  setsockopt (listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  struct sockaddr *address = port ? (struct sockaddr *) &tcp : (struct sockaddr *) &local;
  if (bind (listener, address, port ? sizeof tcp : sizeof local) || listen (listener, SOMAXCONN))
    fail (where);
  return listener;
}

int
main (int argc, char **argv)
{
  if (argc == 2 && strcmp (argv[1], "--version") == 0) {
    puts ("bare, a loop in C");
    return 0;
  }
  if (argc != 3) {
    fprintf (stderr, "usage: bare SOCKET|PORT IMAGE\n");
    return 2;
  }
  struct stat status;
  image = open (argv[2], O_RDWR);
  if (image < 0 || fstat (image, &status))
    fail (argv[2]);
  image_size = status.st_size;
  int listener = listen_at (argv[1]);
  pthread_attr_t detached;
  pthread_attr_init (&detached);
  pthread_attr_setdetachstate (&detached, PTHREAD_CREATE_DETACHED);
  signal (SIGPIPE, SIG_IGN); /* sendfile has no MSG_NOSIGNAL */
  for (;;) {
    int client = accept (listener, NULL, NULL);
    if (client < 0)
      continue;
    struct connection *c = malloc (sizeof *c);
    pthread_t thread;
    if (c == NULL)
      fail ("malloc");
    c->socket = client;
    c->structured = false;
    c->start = c->end = c->used = c->payload_size = 0;
    c->pieces = c->headers = 0;
    c->payload = NULL;
    if (pthread_create (&thread, &detached, serve, c))
      fail ("pthread_create");
  }
}
